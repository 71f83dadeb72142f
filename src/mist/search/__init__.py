"""Many runs of one question: the best deployment of a space, the load that one can take, how several compare.

Above scenarios and runs, under the commands. `evaluate` is one run as a value, `executors` say where runs take place;
every other file is one idea: what is legal, objectives, the store, a strategy, the finalists, capacity, sensitivity.
Nothing here simulates anything itself.
"""

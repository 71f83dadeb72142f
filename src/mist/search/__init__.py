"""Many runs of one question: evaluated in parallel, compared, and bisected for the load that a deployment can take.

Above scenarios and runs, under the commands. `evaluate` is one run as a value, `executors` say where runs take place.
Nothing here simulates anything itself.
"""

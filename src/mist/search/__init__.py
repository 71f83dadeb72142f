"""The best deployment for the money: a scenario with alternatives, searched for its Pareto front.

Above scenarios, which it makes by the hundred and runs through an executor. A file here is one idea: the space, what is
legal in it, objectives, the store, a strategy, the finalists, the result. It never prices a step or a device itself.
"""

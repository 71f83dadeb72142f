"""The local page of `mist ui`: edit a scenario, run it, watch, compare, read reports.

Beside `advice`, under the command line: it serves HTTP on the loopback interface, and whatever is computed is
computed by the library, in processes of its own. It never opens a file outside the folders that it was given.
"""

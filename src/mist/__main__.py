"""`python -m mist`: the command line where the `mist` script isn't on the path.

Above `mist.cli`, and nothing else.
"""

from mist.cli import main

if __name__ == "__main__":
    main(prog_name="mist")

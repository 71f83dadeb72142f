"""The sections of a report, one file each: a function that takes a `View` and returns a fragment, None to be left out.

They compute what they show from records and summary with `mist.metrics`, and build it from the parts in the folder
above.
"""

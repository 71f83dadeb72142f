"""What is made of a result for people and other tools: one file per form.

A report reads a `Result`, its records and its summary; it never runs anything and never changes what it reads.
"""

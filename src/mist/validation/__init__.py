"""Validation: measured points of real systems become scenarios, and error tables say how far a run of each is off.

`points` reads a file of measurements, `setting` turns one operating point into a scenario, `evaluate` runs them all,
`score` makes the tables, `page` the documentation. Nothing here tunes anything: that is `mist.calibration`.
"""

"""Calibration: from what was measured on a user's engine to profiles that scenarios name.

Beside the scenario, whose catalogues it reads; each kind of measurement has a module of its own, with a subcommand of
`mist calibrate` over it. Nothing here simulates, and nothing is fitted without saying how well it does on what it
hadn't seen.
"""

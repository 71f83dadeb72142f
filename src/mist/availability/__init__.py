"""Availability: which replicas serve when, and what becomes of tasks on those that stop.

`outages` takes replicas down, up, in and out of service, and keeps the routes to those that take tasks; `events` (a
scenario's list) and `scaling` (a schedule, a rule) call it at their times; `laws` asks of the records afterwards.
Beside the coordinator, which a run without events and scaling has alone. It never prices anything.
"""

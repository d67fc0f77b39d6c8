"""Models from hubs to this machine: listed, checked, resumable, once. Knows no model and no device.

Nothing here is imported before a model is asked for that is not on this machine.
"""

"""Drivers that are wrong in one way each. `breaks` names the rule that has to find it out.

`evidence` is a pattern of what the suite says. All derive from NumpyDevice, which is right.
"""

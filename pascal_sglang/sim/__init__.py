"""Discrete-event simulator of a cluster, driving the policy that is served.

Imports policy and numpy only.
"""

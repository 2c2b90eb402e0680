"""Many devices: the mesh, where each parameter lies on it, and the kinds of hardware known by name.

`mesh.py` lays the devices out, `rules.py` is the whole sharding spec, `devices.py` the hardware.
"""

"""Many devices: the mesh, where each parameter lies on it, the hardware, and several processes.

`mesh.py` lays the devices out, `rules.py` is the whole sharding spec, `devices.py` the hardware,
`distributed.py` joins processes, `hlo.py` reads what was compiled.
"""

"""What a Flamingo costs: counted (counting), laid out over devices (plan), measured (scaling).

Two commands: commands.py has their options. NumPy alone; the sides in torch that a measurement is
held against are in kernels/tools/scaling_peers.py, and what two processes really hold is measured
by kernels/model/resident.py.
"""

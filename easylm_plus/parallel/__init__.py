"""Where a run lives: the device mesh, and the table that says which array axis is cut along which mesh axis."""

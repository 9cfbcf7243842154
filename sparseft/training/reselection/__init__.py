"""Choosing anew, while a run trains, what trains: by calibration, by the gradients of the steps, a layer a turn."""

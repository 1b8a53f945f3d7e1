"""What a machine with a GPU and no network is asked first: does everything build, is it right, how fast is it?

``python tools/gpu_first`` runs the steps of steps.py one after another, each in a process of its own with a time limit,
and goes on where one fails. Everything that it writes goes to one folder.
"""

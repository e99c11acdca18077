"""Native programs and how they are built: the runner of .pte files for devices without Python, and the counter of instructions.

The sources are part of the package.
"""

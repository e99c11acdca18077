"""The native runner of .pte files for devices without Python, and how it is built; the sources are part of the package."""

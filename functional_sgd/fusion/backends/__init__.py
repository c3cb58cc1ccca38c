"""Who compiles and runs the passes of a program: one folder or file each."""

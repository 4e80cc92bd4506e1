"""Copying between this machine and tasks: the rules (`rules`), which are pure, and local files to
an archive (`pack`) and back (`unpack`). Control.Copy carries the archive; commands/cp.py joins all.
"""

"""What nodes, services and tasks use, as `swarmctl top` shows it: from measurements (`meter`) to
rows (`rows`) to a page on a terminal (`page`), which keys change (`keys`). All of it is pure; the
drawing is cli/commands/top.py's.
"""

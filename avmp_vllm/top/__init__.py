"""``avmp top``: watch a running server's arena in a terminal.

======= ======================================================================
reading what two pages of ``/metrics`` say about the time between them
view    a reading as text
client  reading the page over HTTP
command the command
======= ======================================================================
"""

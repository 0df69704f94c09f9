"""``avmp top``: watch a running server's arena in a terminal; ``avmp memory``: set its budget.

======= ======================================================================
reading what two pages of ``/metrics`` say about the time between them
view    a reading as text
client  reading the page over HTTP
command the command ``avmp top``
memory  the command ``avmp memory``
======= ======================================================================
"""

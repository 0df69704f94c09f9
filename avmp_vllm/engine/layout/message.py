"""How a step's move plan travels: as an attribute of vLLM's ``SchedulerOutput``."""

#: Name of the attribute; pickled with the output to worker processes.
PLAN = "avmp_move_plan"

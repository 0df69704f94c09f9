"""``avmp bench prefix``: what each cache's rules hit on a trace, by memory, without an engine."""

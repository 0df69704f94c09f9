"""Model Runner V1: block tables are resolved on the host."""

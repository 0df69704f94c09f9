"""The paper's experiment: reproduced, then corrected."""

"""Terms of a loss: pure functions on loaded values, each returning its value and its gradient."""

"""What `specjax run` runs: frozen configs with `run()`."""

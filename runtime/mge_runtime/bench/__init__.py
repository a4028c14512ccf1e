"""The instrument that times a chain against what it is held to, in one run and interleaved; `mge-bench` runs it."""

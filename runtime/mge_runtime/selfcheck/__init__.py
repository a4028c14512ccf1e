"""Whether a bundle runs as it should on this device: checks that end in a report which can be posted.

check     `Check`: what one check found         limits    how far answers may be apart
subject   `Subject`: the bundle on one backend  compare   two runs, image by image
pictures  what is checked with                  report    `Report`: text, Markdown, JSON

answers   against ONNX Runtime on the CPU, batches, CUDA graphs
copies    nothing visits the host between graphs
memory    nothing grows from run to run
together  two pipelines in one process
engines   what does not fit is refused; precision is attested
run       all of them

`mge-bench --selfcheck` and the tests marked `gpu` run the same functions. Nothing here measures speed.
"""

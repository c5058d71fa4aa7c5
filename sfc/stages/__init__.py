"""The stages: each reads the artifacts before it, lets the packages do the work, and writes its own.

Which stage has to run is decided in `sfc.pipeline` and `sfc.pipeline_study`, which import a stage only then.
"""

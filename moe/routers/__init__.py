"""Routers: one file each, named by `_target_` in `conf/router/*.yaml`."""

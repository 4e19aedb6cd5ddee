"""Routers, one per file. `_target_` in `conf/router/*.yaml` names the class."""

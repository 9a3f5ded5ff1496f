"""Configuration at the edge: resolvers for ``conf/``, the checks, and readable errors.

``conf/`` holds values only; what depends on several of them is computed by
:mod:`vipllava.config.resolvers`. Library classes never see a configuration object.
"""

"""Configuration at the edge: resolvers for ``conf/``, the checks, and readable errors.

``conf/`` holds values only. What depends on several values (micro-batch, accumulation, strategy)
is computed by the resolvers of :mod:`vipllava.config.resolvers`, so ``--cfg job --resolve`` shows
it. :func:`vipllava.config.checks.check_config` then lists everything that cannot run. Library
classes never see a configuration object.
"""

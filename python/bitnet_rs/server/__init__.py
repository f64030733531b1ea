"""An OpenAI-compatible HTTP server for one model. Needs the extra: `pip install 'bitnet-rs[server]'`.

For `bitnet-rs serve`, and for programs that bring their own ASGI server (`app.create_app`). Apart
because nothing of it is imported unless a model is served: it brings packages that who only
generates does without.
"""

"""The HTTP server: OpenAI's API over one model.

For `bitnet-rs serve`. Apart because it needs packages that the rest does not, those of
`pip install bitnet-rs[server]`; nothing outside it and the command line imports it.
"""

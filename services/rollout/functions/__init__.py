"""Generate functions of users: one call a sample, which makes requests to the engine through an HTTP endpoint.

`sampler` is the way in; `endpoint` and `payload` speak the /generate of SGLang; `calls` runs the requests of a sample;
`trajectory` checks what a function returned.
"""

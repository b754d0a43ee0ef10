"""Rules about access to a run: the gateway and TLS."""

from __future__ import annotations

from collections.abc import Iterator

from miles.addresses import is_loopback, why_not_host
from miles.config.rules.registry import needs, rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings


@rule
def gateway_host_is_a_host(s: FlatSettings) -> Iterator[Fault]:
    if (problem := why_not_host(s.gateway_host)) is not None:
        yield Fault("gateway_host", s.gateway_host, problem, "give a name or address of this machine")


@rule
def gateway_is_not_open_to_everybody(s: FlatSettings) -> Iterator[Fault]:
    if why_not_host(s.gateway_host) is not None:
        return  # another rule reports it
    if s.gateway and not is_loopback(s.gateway_host) and s.gateway_keys_file is None:
        problem = "other machines can reach that, and there are no API keys"
        remedy = "make some with `miles keys create` and set gateway_keys_file, or leave gateway_host out"
        yield Fault("gateway_host", s.gateway_host, problem, remedy)


@rule
def gateway_settings_need_the_gateway(s: FlatSettings) -> Iterator[Fault]:
    for key in ("gateway_host", "gateway_port", "gateway_keys_file", "gateway_allowed_root", "gateway_allowed_module"):
        yield from needs(s, key, "gateway")


@rule
def certificate_and_key_go_together(s: FlatSettings) -> Iterator[Fault]:
    if s.tls_cert is not None and s.tls_key is None:
        yield Fault("tls_key", None, "tls_cert is no use without its key", "set it to the key's file")
    if s.tls_key is not None and s.tls_cert is None:
        yield Fault("tls_cert", None, "tls_key is no use without its certificate", "set it to the certificate's file")
    if s.tls_ca is not None and s.tls_cert is None and s.tls_key is None:
        yield Fault("tls_cert", None, "tls_ca alone does not encrypt anything", "set tls_cert and tls_key too")


@rule
def mutual_tls_needs_an_authority(s: FlatSettings) -> Iterator[Fault]:
    if s.tls_mutual and s.tls_ca is None:
        yield Fault(
            "tls_ca", None, "tls_mutual must know whose certificates to accept", "set it to the authority's file"
        )

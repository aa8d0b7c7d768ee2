"""A webhook that is a signed query string, VNPay's or MoMo's, before its signature is looked at.

Promise: what is read is the whole of what can have been signed: each name once, and nothing beside them.
"""

from urllib.parse import parse_qsl

from domain.notices import Verdict, WebhookRefused, WebhookRequest


def signed_pairs(request: WebhookRequest) -> dict[str, str]:
    """The texts in the query string, in its order, in which a plus is a space; each name once, for all may be signed.

    Raises:
        WebhookRefused: MALFORMED.
    """
    if request.body:
        # The query alone is signed, and a body would be kept as the evidence in its place. VNPay sends none, nor does a
        # browser.
        raise WebhookRefused(Verdict.MALFORMED, "a body, which nobody signed")
    try:
        pairs = parse_qsl(
            request.query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=100
        )
    except ValueError as error:
        raise WebhookRefused(Verdict.MALFORMED, "no query string") from error
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise WebhookRefused(Verdict.MALFORMED, "a parameter occurs twice")
    return fields

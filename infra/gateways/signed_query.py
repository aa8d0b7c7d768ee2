"""Parse a webhook that is a signed query string, VNPay's or MoMo's, before its signature is verified.

Promise: the result holds everything that can have been signed, each name once, and the request has nothing else.
"""

from urllib.parse import parse_qsl

from domain.notices import Verdict, WebhookRefused, WebhookRequest


def signed_pairs(request: WebhookRequest) -> dict[str, str]:
    """The parameters of the query string, in its order; a plus is a space. No name may repeat: each may be signed.

    Raises:
        WebhookRefused: MALFORMED.
    """
    if request.body:
        # Only the query is signed, yet a body would be stored as the evidence instead. Neither VNPay nor a browser
        # sends one.
        raise WebhookRefused(Verdict.MALFORMED, "a body, which is not signed")
    try:
        pairs = parse_qsl(
            request.query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=100
        )
    except ValueError as error:
        raise WebhookRefused(Verdict.MALFORMED, "not a query string") from error
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise WebhookRefused(Verdict.MALFORMED, "a parameter occurs twice")
    return fields

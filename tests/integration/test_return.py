"""The payer's browser returns from MoMo with MoMo's signed result, which counts even if the IPN never arrives."""

import httpx
from pydantic import SecretStr

from app.settings import Settings
from infra.gateways.momo import MoMoConfig, MoMoGateway
from infra.sandbox.momo import ACCESS, PARTNER, SECRET
from tests.support.sandbox import running_sandbox
from tests.support.service import delivery, events_of, new_payment_id, running_worker, value
from tests.support.waiting import until
from tests.support.webhooks import applied, applying, kinds, serving

NOWHERE = "https://ipn.invalid/webhooks/momo"
MONEY = {"amount_minor": 50_000, "currency": "VND", "payment_method": "wallet"}


def settings(postgres_url: str) -> Settings:
    own = {"momo_partner_code": PARTNER, "momo_access_key": ACCESS, "momo_secret_key": SECRET}
    own |= {"momo_redirect_url": NOWHERE, "momo_ipn_url": NOWHERE}
    return Settings(postgres_url=postgres_url, gateways=["momo"], default_gateway="momo", **own)  # type: ignore[arg-type]


async def test_the_return_of_the_browser_tells_the_result_once_and_the_payer_reads_a_text(postgres_url: str) -> None:
    payment_id = new_payment_id()
    with running_sandbox() as sandbox_url:
        async with serving(settings(postgres_url)) as url:
            config = MoMoConfig(
                partner_code=PARTNER,
                access_key=ACCESS,
                secret_key=SecretStr(SECRET),
                api_base=sandbox_url,
                redirect_url=f"{url}/webhooks/momo",
                ipn_url=NOWHERE,
            )
            gateway = MoMoGateway(config)
            async with (
                running_worker(postgres_url, gateway) as worker,
                applying(postgres_url, worker),
                httpx.AsyncClient(follow_redirects=True) as browser,
            ):
                await worker.accept(delivery("charge", payment_id, "charge", **MONEY))
                await worker.idle()
                [waiting] = await events_of(postgres_url, payment_id)
                page = waiting["action"]["url"]
                answers = [await browser.post(f"{page}&success=true&redirect=true") for _ in range(2)]
                await until(lambda: applied(postgres_url))
            await gateway.close()
    assert [each.status_code for each in answers] == [200, 200]
    assert "return to the shop" in answers[0].text
    assert await kinds(postgres_url, payment_id) == ["requires_action", "captured"]
    assert await value(postgres_url, "SELECT count(*) FROM inbox") == 1

import sys, asyncio
from app.settings import Settings
from infra.observability.logs import configure_logs
from app.http import create_process_app
from app.process import run
what=sys.argv[1]; s=Settings(); configure_logs(what,as_json=True)
if what=="worker":
    from app.worker import Worker
    w=Worker(s); run(w.run, app=create_process_app(checks=w.checks()), host="127.0.0.1", port=s.worker_port)
elif what=="relay":
    from infra.relay import Relay, RelayConfig
    r=Relay(RelayConfig(postgres_url=s.postgres_url,kafka_bootstrap=s.kafka_bootstrap,topic=s.events_topic,slot=s.relay_slot))
    async def c(): return r.trouble
    run(r.run, app=create_process_app(checks={"relay":c}), host="127.0.0.1", port=s.relay_port)
elif what=="sandbox":
    from infra.sandbox.stripe import serve
    serve("127.0.0.1", int(sys.argv[3]), state_file=None)

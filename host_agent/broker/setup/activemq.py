"""A configuration for ActiveMQ 5.17, as Debian packages it."""

from __future__ import annotations

import secrets
from xml.sax.saxutils import quoteattr

from common.files import write_private

from .certificates import make_keystore
from .plan import Plan
from .write import executable, write_readme

PACKAGES = "activemq libxstream-java libjettison-java libxpp3-java"
STATISTICS_JARS = ("xstream", "jettison", "xpp3")
JARS = "/usr/share/java"

# Debian's ActiveMQ logs through log4j 1.2.
_LOG4J = """\
log4j.rootLogger=WARN, console
log4j.appender.console=org.apache.log4j.ConsoleAppender
log4j.appender.console.layout=org.apache.log4j.PatternLayout
log4j.appender.console.layout.ConversionPattern=%d %-5p %m%n
"""

# Not by Debian's own script, whose options file sets the directory and the memory over ours.
_RUN = """\
#!/bin/sh
# Runs the broker in the foreground until it gets SIGTERM or Ctrl-C.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
umask 077
home="${ACTIVEMQ_HOME:-/usr/share/activemq}"
cd "$here"
exec "${JAVA:-java}" ${ACTIVEMQ_OPTS:--Xms64M -Xmx512M} \\
    -Dactivemq.home="$home" -Dactivemq.base="$here" -Dactivemq.conf="$here" -Dactivemq.data="$here/data" \\
    -Djava.io.tmpdir="$here/tmp" -Djava.awt.headless=true -Dlog4j.configuration="file:$here/log4j.properties" \\
    --add-opens=java.base/java.lang=ALL-UNNAMED --add-opens=java.base/java.util=ALL-UNNAMED \\
    --add-opens=java.base/java.util.concurrent=ALL-UNNAMED \\
    --add-opens=java.base/java.util.concurrent.atomic=ALL-UNNAMED \\
    -jar "$home/bin/activemq.jar" start "xbean:file:$here/activemq.xml"
"""

_STATISTICS = """\
Statistics: log in as `monitor` (passcode in monitor.passcode), SUBSCRIBE to `/temp-queue/statistics` with the header
`transformation:jms-map-json`, and SEND an empty message to `/queue/ActiveMQ.Statistics.Broker` or
`/queue/ActiveMQ.Statistics.Destination.<queue>` with `reply-to:/temp-queue/statistics`; the answer comes as JSON.
"""


def write(plan: Plan) -> None:
    """Everything in the plan's directory that ActiveMQ needs."""
    folder = plan.directory
    optional = folder / "lib" / "optional"
    for path in (folder / "data", folder / "tmp", optional):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for jar in STATISTICS_JARS:
        link = optional / f"{jar}.jar"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{JARS}/{jar}.jar")
    keystore_passcode = ""
    if plan.tls:
        keystore_passcode = secrets.token_urlsafe(24)
        passcode_file = folder / "tls" / "keystore.passcode"
        write_private(passcode_file, f"{keystore_passcode}\n".encode())
        make_keystore(plan.server_certificate, plan.server_key, folder / "tls" / "server.p12", passcode_file)
        passcode_file.unlink()
    write_private(folder / "activemq.xml", configuration(plan, keystore_passcode).encode())
    (folder / "log4j.properties").write_text(_LOG4J)
    executable(folder / "run", _RUN)
    write_readme(plan, "ActiveMQ", PACKAGES, _STATISTICS)


def configuration(plan: Plan, keystore_passcode: str) -> str:
    """activemq.xml. Each login is the only member of a group of the same name, and rights go to groups."""
    limits = plan.limits
    scheme = "stomp+nio+ssl" if plan.tls else "stomp+nio"
    options = [
        f"wireFormat.maxFrameSize={limits.frame_bytes}",
        f"wireFormat.maxDataLength={limits.frame_bytes}",
        "transport.hbGracePeriodMultiplier=2.0",
        "transport.connectAttemptTimeout=10000",
    ]
    if plan.tls:
        options.append("transport.enabledProtocols=TLSv1.2,TLSv1.3")
    address = f"[{plan.address}]" if ":" in plan.address else plan.address
    uri = f"{scheme}://{address}:{plan.port}?{'&'.join(options)}"
    ssl = (
        f'<sslContext><sslContext keyStore="file:{plan.directory}/tls/server.p12" keyStoreType="PKCS12" '
        f"keyStorePassword={quoteattr(keystore_passcode)}/></sslContext>"
        if plan.tls
        else ""
    )
    return f"""\
<beans xmlns="http://www.springframework.org/schema/beans" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
       xsi:schemaLocation="http://www.springframework.org/schema/beans
         http://www.springframework.org/schema/beans/spring-beans-2.0.xsd
         http://activemq.apache.org/schema/core http://activemq.apache.org/schema/core/activemq-core.xsd">
  <broker xmlns="http://activemq.apache.org/schema/core" brokerName="vmwrapper" useJmx="false" persistent="false"
          advisorySupport="true" schedulerSupport="false" useShutdownHook="true" dataDirectory="data">
    <destinationPolicy><policyMap>
      <policyEntries>
        <!-- Expired messages are dropped, not kept: the agents send again whatever still matters. -->
        <policyEntry queue=">" memoryLimit="{limits.queue_bytes}" producerFlowControl="true" queuePrefetch="100"
                     expireMessagesPeriod="5000" optimizedDispatch="true" maxPageSize="1000">
          <deadLetterStrategy>
            <sharedDeadLetterStrategy processExpired="false" processNonPersistent="true"
                                      expiration="{limits.message_seconds * 1000}"/>
          </deadLetterStrategy>
        </policyEntry>
        <!-- Only its host writes to a guest's queue, through the connection that serves all its guests: a dead guest
             must not hold it up. What is there is bounded by the host's window and by the time that it may wait. -->
        <policyEntry queue="vmwrapper.guest.>" producerFlowControl="false" queuePrefetch="100"
                     expireMessagesPeriod="5000" optimizedDispatch="true" maxPageSize="1000">
          <deadLetterStrategy>
            <sharedDeadLetterStrategy processExpired="false" processNonPersistent="false"/>
          </deadLetterStrategy>
        </policyEntry>
        <!-- A slow reader of a topic loses the oldest. -->
        <policyEntry topic=">" producerFlowControl="false" topicPrefetch="1000">
          <pendingMessageLimitStrategy><constantPendingMessageLimitStrategy limit="1000"/></pendingMessageLimitStrategy>
        </policyEntry>
      </policyEntries>
    </policyMap></destinationPolicy>
    <!-- Made beforehand: no agent may make a destination. -->
    <destinations>
{_destinations(plan)}
    </destinations>
    <plugins>
      <simpleAuthenticationPlugin><users>
{_users(plan)}
      </users></simpleAuthenticationPlugin>
      <authorizationPlugin><map><authorizationMap><authorizationEntries>
{_rights(plan)}
      </authorizationEntries>
      <tempDestinationAuthorizationEntry><tempDestinationAuthorizationEntry
          read="{plan.monitor.name}" write="{plan.monitor.name}" admin="{plan.monitor.name}"/>
      </tempDestinationAuthorizationEntry></authorizationMap></map></authorizationPlugin>
      <!-- By the broker's clock, because guests' clocks are wrong after a pause or a restore. -->
      <timeStampingBrokerPlugin ttlCeiling="{limits.message_seconds * 1000}"
                                zeroExpirationOverride="{limits.message_seconds * 1000}"/>
      <statisticsBrokerPlugin/>
    </plugins>
    {ssl}
    <systemUsage><systemUsage>
      <memoryUsage><memoryUsage percentOfJvmHeap="70"/></memoryUsage>
    </systemUsage></systemUsage>
    <transportConnectors>
      <transportConnector name="stomp" uri={quoteattr(uri)}/>
    </transportConnectors>
  </broker>
</beans>
"""


def _destinations(plan: Plan) -> str:
    queues = [f"vmwrapper.host.{host.host.name}" for host in plan.hosts]
    queues += [f"vmwrapper.guest.{guest.name}" for host in plan.hosts for guest in host.guests]
    lines = [f'      <queue physicalName="{queue}"/>' for queue in queues]
    lines += [f'      <topic physicalName="vmwrapper.{topic}"/>' for topic in ("presence", "status")]
    return "\n".join(lines)


def _users(plan: Plan) -> str:
    logins = [plan.monitor, *(login for host in plan.hosts for login in (host.host, *host.guests))]
    return "\n".join(
        f'        <authenticationUser username="{login.name}" password={quoteattr(login.passcode)} '
        f'groups="{login.name}"/>'
        for login in logins
    )


def _rights(plan: Plan) -> str:
    monitor = plan.monitor.name
    # "operators" has no member: the broker wants a value, and nobody shall make or remove destinations.
    nobody = "operators"
    entries = []
    for host in plan.hosts:
        name = host.host.name
        guests = ",".join(guest.name for guest in host.guests)
        entries.append(("queue", f"vmwrapper.host.{name}", name, guests, nobody))
        # The host reads its guests' queues, too: it empties one before another guest gets the login.
        entries += [
            ("queue", f"vmwrapper.guest.{guest.name}", f"{guest.name},{name}", name, nobody) for guest in host.guests
        ]
    hosts = ",".join(host.host.name for host in plan.hosts)
    guests = ",".join(guest.name for host in plan.hosts for guest in host.guests)
    entries.append(("topic", "vmwrapper.presence", f"{hosts},{monitor}", guests, nobody))
    entries.append(("topic", "vmwrapper.status", monitor, hosts, nobody))
    # What the broker tells of connections. It makes those topics in the name of whoever connects, so everybody may.
    everybody = ",".join((monitor, hosts, guests))
    entries.append(("topic", "ActiveMQ.Advisory.>", monitor, nobody, everybody))
    entries.append(("queue", "ActiveMQ.Statistics.>", monitor, monitor, monitor))
    return "\n".join(
        f'        <authorizationEntry {kind}="{name}" read="{read}" write="{write}" admin="{admin}"/>'
        for kind, name, read, write, admin in entries
    )

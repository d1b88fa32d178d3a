#!/usr/bin/python3
"""What can be said of the pipelines without running them: names in docs/pipelines.md are those of records, and in the
configurations of Vector, Fluent Bit and the OpenTelemetry Collector each option is one that their documentation has.
"""

import json
import os
import re
import sys

import yaml

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PIPELINES = os.path.join(ROOT, "packaging", "pipelines")

# By component: the page that has its options, and those of them that are used, or that someone will want to.
VECTOR = {
    "": ("vector.dev/docs/reference/configuration/global-options", "data_dir sources transforms sinks"),
    "sources file": ("vector.dev/docs/reference/configuration/sources/file",
                     "type include exclude read_from max_line_bytes data_dir ignore_older_secs rotate_wait_secs glob_minimum_cooldown_ms "
                     "fingerprint.strategy fingerprint.lines"),
    "transforms remap": ("vector.dev/docs/reference/configuration/transforms/remap",
                         "type inputs source file drop_on_error drop_on_abort reroute_dropped timezone"),
    "sinks clickhouse": ("vector.dev/docs/reference/configuration/sinks/clickhouse",
                         "type inputs endpoint database table format skip_unknown_fields date_time_best_effort compression batch.max_events "
                         "batch.max_bytes batch.timeout_secs buffer.type buffer.max_size buffer.when_full acknowledgements.enabled "
                         "auth.strategy auth.user auth.password request.retry_attempts request.timeout_secs tls.ca_file"),
    "sinks file": ("vector.dev/docs/reference/configuration/sinks/file", "type inputs path compression encoding.codec"),
}
FLUENT_BIT = {
    "": ("docs.fluentbit.io/manual/administration/configuring-fluent-bit/yaml", "service parsers pipeline"),
    "service": ("docs.fluentbit.io/manual/administration/buffering-and-storage, scheduling-and-retries",
                "flush grace log_level storage.path storage.sync storage.checksum storage.max_chunks_up storage.backlog.mem_limit "
                "scheduler.base scheduler.cap"),
    "parsers": ("docs.fluentbit.io/manual/data-pipeline/parsers/json", "name format time_key time_format time_keep"),
    "pipeline": ("docs.fluentbit.io/manual/administration/configuring-fluent-bit/yaml/pipeline-section", "inputs filters outputs"),
    "inputs tail": ("docs.fluentbit.io/manual/data-pipeline/inputs/tail",
                    "name tag path parser db db.sync db.locking read_from_head refresh_interval rotate_wait buffer_chunk_size "
                    "buffer_max_size skip_long_lines skip_empty_lines storage.type"),
    "filters grep": ("docs.fluentbit.io/manual/data-pipeline/filters/grep", "name match regex exclude logical_op"),
    "outputs http": ("docs.fluentbit.io/manual/data-pipeline/outputs/http",
                     "name match host port uri format json_date_key json_date_format header compress http_user http_passwd workers tls "
                     "retry_limit storage.total_limit_size"),
}
COLLECTOR = {
    "": ("opentelemetry.io/docs/collector/configuration", "extensions receivers processors exporters service"),
    "service": ("opentelemetry.io/docs/collector/configuration", "extensions pipelines.logs.receivers pipelines.logs.exporters"),
    "extensions file_storage": ("opentelemetry-collector-contrib/extension/storage/filestorage", "directory timeout create_directory fsync"),
    "receivers file_log": ("opentelemetry-collector-contrib/receiver/filelogreceiver",
                           "include exclude start_at include_file_name max_log_size poll_interval storage operators "
                           "retry_on_failure.enabled retry_on_failure.max_elapsed_time"),
    "operators json_parser": ("opentelemetry-collector-contrib/pkg/stanza/docs/operators/json_parser.md, types/timestamp.md, types/on_error.md",
                              "type id on_error if parse_from parse_to timestamp.parse_from timestamp.layout_type timestamp.layout"),
    "operators move": ("opentelemetry-collector-contrib/pkg/stanza/docs/operators/move.md", "type id if from to on_error"),
    "exporters clickhouse": ("opentelemetry-collector-contrib/exporter/clickhouseexporter",
                             "endpoint username password database logs_table_name create_schema async_insert ttl compress timeout "
                             "sending_queue.enabled sending_queue.num_consumers sending_queue.queue_size sending_queue.block_on_overflow "
                             "sending_queue.storage sending_queue.batch.min_size sending_queue.batch.flush_timeout retry_on_failure.enabled "
                             "retry_on_failure.initial_interval retry_on_failure.max_interval retry_on_failure.max_elapsed_time"),
}


class Strict(yaml.SafeLoader):
    """A key that is there twice is an error, which YAML's own loader passes over."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"twice: {twice}, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def load(name):
    with open(os.path.join(PIPELINES, name), encoding="utf-8") as file:
        return yaml.load(file, Strict)


def text_of(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def options_of(component, skip=()):
    """Names of its options, those within others joined by dots."""
    for name, value in component.items():
        if isinstance(value, dict) and name not in skip:
            for inner in options_of(value):
                yield f"{name}.{inner}"
        else:
            yield name


def unknown(documented, kind, component, skip=()):
    """Complaints about a component's options."""
    if kind not in documented:
        return [f"{kind}: no documentation is named for it"]
    page, known = documented[kind]
    return [f"{kind}: {name} is not in {page}" for name in options_of(component, skip) if name not in known.split()]


def check_vector(found):
    """Each component's options, and that its inputs are there."""
    configuration = load("vector.yaml")
    found += unknown(VECTOR, "", {name: None for name in configuration})
    names, dropped = set(), set()
    for kind in ("sources", "transforms", "sinks"):
        for name, component in configuration[kind].items():
            found += unknown(VECTOR, f"{kind} {component['type']}", component)
            for source in component.get("inputs", []):
                if source not in names | dropped:
                    found.append(f"{name}: no component {source}")
            names.add(name)
            if component.get("reroute_dropped"):
                dropped.add(f"{name}.dropped")
    used = {source for kind in ("transforms", "sinks") for one in configuration[kind].values() for source in one["inputs"]}
    found += [f"nothing reads {name}" for name in (names | dropped) - set(configuration["sinks"]) - used]
    sink = configuration["sinks"]["finrace_clickhouse"]
    check_table(f"{sink['database']}.{sink['table']}", found)
    check_file(configuration["sources"]["finrace_file"]["include"], found)


def check_fluent_bit(found):
    configuration = load("fluent-bit.yaml")
    found += unknown(FLUENT_BIT, "", {name: None for name in configuration})
    found += unknown(FLUENT_BIT, "service", configuration["service"])
    for parser in configuration["parsers"]:
        found += unknown(FLUENT_BIT, "parsers", parser)
    found += unknown(FLUENT_BIT, "pipeline", {name: None for name in configuration["pipeline"]})
    for kind, components in configuration["pipeline"].items():
        for component in components:
            found += unknown(FLUENT_BIT, f"{kind} {component['name']}", component)
    (tail,), (http,) = configuration["pipeline"]["inputs"], configuration["pipeline"]["outputs"]
    if tail["parser"] not in [parser["name"] for parser in configuration["parsers"]]:
        found.append(f"no parser {tail['parser']}")
    for component in configuration["pipeline"]["filters"]:
        key = (component.get("regex") or component["exclude"]).split()[0]
        if "." in key and not key.startswith("$"):
            found.append(f"grep takes {key} for a field {key.split('.')[0]}: a name ends at its first dot")
    for component in (*configuration["pipeline"]["filters"], http):
        if component["match"] != tail["tag"]:
            found.append(f"{component['name']} takes {component['match']}, not {tail['tag']}")
    check_insert(http["uri"], found)
    check_file([tail["path"]], found)


def check_collector(found):
    configuration = load("otel-collector.yaml")
    found += unknown(COLLECTOR, "", {name: None for name in configuration})
    found += unknown(COLLECTOR, "service", configuration["service"])
    for kind in ("extensions", "receivers", "exporters"):
        for name, component in configuration[kind].items():
            found += unknown(COLLECTOR, f"{kind} {name.split('/')[0]}", component)
            storages = [component.get("storage"), component.get("sending_queue", {}).get("storage")]
            found += [f"{name}: no extension {one}" for one in storages if one and one not in configuration["service"]["extensions"]]
    for operator in configuration["receivers"]["file_log"]["operators"]:
        found += unknown(COLLECTOR, f"operators {operator['type']}", operator)
        for name in re.findall(r'(?:attributes|resource)\["([^"]+)"\]', json.dumps(operator).replace('\\"', '"')):
            if name not in record_names():
                found.append(f"operator {operator['type']}: no record has {name}")
    pipeline = configuration["service"]["pipelines"]["logs"]
    for kind in ("receivers", "exporters"):
        if set(pipeline[kind]) != set(configuration[kind]):
            found.append(f"{kind}: {pipeline[kind]} are used, {sorted(configuration[kind])} are there")
    if set(configuration["service"]["extensions"]) != set(configuration["extensions"]):
        found.append("an extension is not used, or not there")
    check_file(configuration["receivers"]["file_log"]["include"], found)


def check_file(paths, found):
    """It is the file that the packaged configuration writes."""
    if f'output = {json.dumps(paths)}' not in text_of("packaging", "finrace.toml"):
        found.append(f"packaging/finrace.toml does not write {paths}")


def check_table(name, found):
    if f"CREATE TABLE IF NOT EXISTS {name} " not in text_of("packaging", "clickhouse", "schema.sql"):
        found.append(f"packaging/clickhouse/schema.sql has no table {name}")


def check_insert(text, found):
    """A URL's INSERT goes into a table that is there, and passes over what the table has not."""
    match = re.search(r"query=INSERT%20INTO%20([a-z_.]+)%20FORMAT%20JSONEachRow&input_format_skip_unknown_fields=1", text)
    if match is None:
        found.append(f"no INSERT: {text}")
    else:
        check_table(match[1], found)


def check_syslog_daemons(found):
    """What the live test replaces, checked here as it ships."""
    text = text_of("packaging", "pipelines", "syslog-ng.conf")
    check_insert(text, found)
    check_file(re.findall(r'@define finrace_file "(.*)"', text), found)
    check_file(re.findall(r'file="(/var/log/finrace/[^"]*)"', text_of("packaging", "pipelines", "rsyslog.conf")), found)


def record_names():
    """The flattened names of all values that docs/record.schema.json allows."""
    definitions = json.loads(text_of("docs", "record.schema.json"))["$defs"]

    def names(node, prefix):
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
        if "properties" not in node:
            return {prefix}
        return set().union(*(names(inner, f"{prefix}.{name}" if prefix else name) for name, inner in node["properties"].items()))

    return set().union(*(names(definitions[f"{kind}_record"], "") for kind in ("verdict", "connection", "upstream", "health")))


def check_names(found):
    """The two tables of names: all are names of records', none twice, and each that is not finrace's own is there."""
    real = record_names()
    tables = re.findall(r"^\| name \|.*\n\|[-|]+\n((?:\|.*\n)+)", text_of("docs", "pipelines.md"), re.MULTILINE)
    if len(tables) != 2:
        found.append(f"docs/pipelines.md has {len(tables)} tables of names, not 2")
    for table in tables:
        names = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
        if len(names) != len(table.splitlines()):
            found.append(f"a line names nothing: {table}")
        found += [f"docs/pipelines.md: no record has {name}" for name in names if name not in real]
        found += [f"docs/pipelines.md: {name} is there twice" for name in set(names) if names.count(name) > 1]
        found += [f"docs/pipelines.md lacks {name}" for name in real - set(names) if not name.startswith("finrace.")]


def check_shipped(found):
    """docs/pipelines.md names each file that ships; each says first what it is."""
    page = text_of("docs", "pipelines.md")
    for name in os.listdir(PIPELINES):
        if f"`{name}`" not in page:
            found.append(f"docs/pipelines.md does not name {name}")
        first = "".join(text_of("packaging", "pipelines", name).splitlines(True)[:2])
        if "finrace's records" not in first:
            found.append(f"{name} does not say first what it is")
    for word in ("Vector 0.58", "Fluent Bit 5.1", "0.149"):
        if word not in page:
            found.append(f"docs/pipelines.md does not name {word}")


def main():
    passed = failed = 0
    for check in (check_vector, check_fluent_bit, check_collector, check_syslog_daemons, check_names, check_shipped):
        found = []
        check(found)
        passed, failed = passed + (not found), failed + bool(found)
        print(f"  {'FAIL' if found else 'pass'}  {check.__name__.removeprefix('check_').replace('_', ' ')}")
        for complaint in found:
            print(f"          {complaint}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/reporter.h"

#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <sstream>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "cli/options.h"
#include "cli/process_names.h"
#include "core/classify.h"
#include "core/software.h"
#include "core/units.h"
#include "sink/facts.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

constexpr auto listening_retried = std::chrono::seconds(5);

std::chrono::nanoseconds duration_of(const timeval& time)
{
    return std::chrono::seconds(time.tv_sec) + std::chrono::microseconds(time.tv_usec);
}

ProcessUse use_of_this_process(double started_s)
{
    rusage used{};
    ::getrusage(RUSAGE_SELF, &used);
    // Pages: in all, resident, ... (proc(5)).
    std::istringstream pages(read_whole("/proc/self/statm"));
    std::uint64_t all = 0;
    std::uint64_t resident = 0;
    pages >> all >> resident;
    return {.processor = duration_of(used.ru_utime) + duration_of(used.ru_stime),
            .resident_bytes = resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)),
            .started_s = started_s};
}

std::uint64_t random_number()
{
    std::uint64_t number = 0;
    if (::getrandom(&number, sizeof(number), 0) != sizeof(number))
        throw UsageError(fmt::format("no random numbers to name this run by: {}", std::strerror(errno)));
    return number;
}

std::optional<UpstreamKey> upstream_of(const event& e)
{
    return is_client(e) ? std::optional(UpstreamKey::of(e)) : std::nullopt;
}

/// OpenTelemetry's names, but for systemd's units, for which it has none.
void add_placement(Json& record, const Placement& there)
{
    if (!there.cgroup.empty())
        record["process"]["linux"]["cgroup"] = there.cgroup;
    if (!there.unit.empty())
        record["finrace"]["systemd_unit"] = there.unit;
    if (!there.container_id.empty())
        record["container"]["id"] = there.container_id;
    if (!there.pod_uid.empty())
        record["k8s"]["pod"]["uid"] = there.pod_uid;
    if (!there.pod_name.empty()) {
        record["k8s"]["pod"]["name"] = there.pod_name;
        record["k8s"]["namespace"]["name"] = there.pod_namespace;
    }
}

} // namespace

Reporter::Reporter(RunOptions options, Outputs& outputs, const Feed& feed)
    : options_(std::move(options)), disguise_(options_.addresses.disguise()), outputs_(outputs), feed_(feed)
{
    name_run();
    begin();
}

void Reporter::serve(ServiceManager& manager, const std::optional<Confinement>& confinement)
{
    manager_ = &manager;
    confinement_ = confinement;
    manager_->ready(state());
}

void Reporter::serve_metrics(LiveLoop& loop, MetricsListener listener)
{
    const auto label_of = [this](const UpstreamKey& key) {
        return UpstreamLabel{.address = disguise_.of_upstream(address_text(key.address.data(), key.family)),
                             .name = std::string(options_.addresses.names.of(key))};
    };
    const auto since_epoch = std::chrono::system_clock::now().time_since_epoch();
    meter_.emplace(Meter{
        .loop = loop, .metrics = Metrics(label_of), .started_s = std::chrono::duration<double>(since_epoch).count()});
    listener_.emplace(std::move(listener));
    if (listener_->problem() == 0)
        answer_if_it_listens();
    else
        say(fmt::format("warning: --metrics{}: {}; nobody is answered there until it can be had, which is tried again",
                        told_address(" "), std::strerror(listener_->problem())));
    tried_to_listen_ = std::chrono::steady_clock::now();
}

/// Where metrics are served, behind `before`; nothing where this host's addresses are hidden.
std::string Reporter::told_address(const char* before) const
{
    return options_.addresses.hides_all() ? "" : before + listener_->address();
}

void Reporter::answer_if_it_listens()
{
    if (!listener_->try_to_listen())
        return;
    server_.emplace(listener_->descriptor(), [this] { return metrics(); });
    meter_->loop.watch_input(server_->descriptor(), [this] { server_->serve(); });
}

void Reporter::change(const RunOptions& fresh)
{
    options_.addresses.names = fresh.addresses.names;
    options_.interval = fresh.interval;
    outputs_.flatten(fresh.flat);
    const auto chosen = [](std::vector<std::string> flags) { // in whatever order a file or a command line has them
        std::sort(flags.begin(), flags.end());
        return flags;
    };
    if (chosen(options_.watch.filter.flags) != chosen(fresh.watch.filter.flags))
        open_.lose_track(); // what is no longer chosen ends unseen
    options_.watch.filter = fresh.watch.filter;
    next_summary_ns_ = std::min(next_summary_ns_, feed_.now_ns() + interval_ns());
}

void Reporter::on_event(const event& e)
{
    if (is_client(e))
        open_.follow(e);
    if (options_.connections) {
        histories_.add(e);
        if (e.kind == EVENT_CLOSED || e.kind == EVENT_OPEN_FAILED)
            put(connection_record(origin(), e, histories_.take(e.connection.id), name_of(e.connection)),
                upstream_of(e));
    }
    if (outputs_.is_due())
        flush();
}

void Reporter::on_verdict(const Judged& judged)
{
    const Verdict& verdict = *judged.classification.verdict;
    const std::string name = name_of(judged.e.connection);
    if (meter_)
        meter_->metrics.count(judged);
    put(judged.benched != nullptr
            ? benched_record(origin(), judged.e, *judged.benched, verdict, name, judged.outcome)
            : verdict_record(origin(), judged.e, verdict, judged.upstream, name, judged.outcome, judged.server_end),
        upstream_of(judged.e));
    flush(); // the rest of the batch must not keep it waiting
}

bool Reporter::on_tick()
{
    if (started_ns_ == 0)
        begin();
    if (const std::uint64_t now_ns = feed_.now_ns(); now_ns >= next_summary_ns_) {
        summarise(false);
        next_summary_ns_ += (1 + (now_ns - next_summary_ns_) / interval_ns()) * interval_ns();
    }
    flush();
    outputs_.retry(std::chrono::steady_clock::now());
    outputs_.say_news();
    if (server_)
        server_->serve(); // lets go of who is silent
    if (const auto now = std::chrono::steady_clock::now(); unserved() && now - tried_to_listen_ >= listening_retried) {
        tried_to_listen_ = now;
        try {
            answer_if_it_listens();
            if (server_)
                say(fmt::format("metrics are served{} now", told_address(" at ")));
        } catch (const UsageError& error) {
            if (!std::exchange(library_refused_, true))
                say(fmt::format("{}; that is tried again", error.what()));
        }
    }
    if (manager_ != nullptr)
        manager_->alive();
    return !outputs_.ended();
}

void Reporter::on_end()
{
    if (manager_ != nullptr)
        manager_->stopping();
    if (started_ns_ == 0)
        begin();
    if (!outputs_.ended())
        summarise(true);
    started_ns_ = 0;
    open_ = OpenTable();
    histories_ = StateHistories();
    told_.clear();
    name_run(); // a recording may hold another one
}

bool Reporter::on_hangup()
{
    if (!outputs_.beyond_standard_output() && !reload_)
        return manager_ != nullptr && manager_->is_there(); // a service ends by SIGTERM
    if (manager_ != nullptr)
        manager_->reloading();
    outputs_.open_anew();
    if (reload_)
        reload_();
    if (manager_ != nullptr)
        manager_->reloaded();
    return true;
}

void Reporter::summarise(bool last)
{
    const std::uint64_t now_ns = feed_.now_ns();
    tell_upstreams(now_ns, last);
    put(health_record(origin(), now_ns, health(last)));
    if (manager_ != nullptr)
        manager_->status(state());
}

std::function<OpenConnections(const UpstreamKey&)> Reporter::open_now(std::uint64_t now_ns) const
{
    // Of connections that are older than finrace it is not known for how long they have been open, nor how many are; of
    // a lost event not whose end it was.
    const SourceCounts counts = feed_.counts();
    const bool knows =
        !open_.lost_track() && counts.lost() == 0 && feed_.intake().adopted_ended() >= counts.connections_adopted;
    return [open = open_.at(now_ns), knows](const UpstreamKey& key) {
        const auto found = open.find(key);
        OpenConnections there = found != open.end() ? found->second : OpenConnections{};
        if (!knows)
            there.longest_ns = std::numeric_limits<std::uint64_t>::max();
        return there;
    };
}

void Reporter::tell_upstreams(std::uint64_t now_ns, bool all)
{
    const auto open = open_now(now_ns);
    std::unordered_map<UpstreamKey, UpstreamCounts, UpstreamKeyHash> told;
    feed_.intake().upstreams().for_each([&](const UpstreamKey* key, const Upstream& upstream) {
        const UpstreamKey where = key != nullptr ? *key : UpstreamKey{};
        const auto before = told_.find(where);
        if (all || before == told_.end() || before->second != upstream.counts) {
            const OpenConnections there = open(where);
            put(upstream_record(
                    origin(), now_ns, key, upstream,
                    exposure_of(upstream, upstream.watched_ns(now_ns - started_ns_, now_ns), there, Ends{})),
                key != nullptr ? std::optional(*key) : std::nullopt);
        }
        told.emplace(where, upstream.counts);
    });
    told_ = std::move(told);
}

/// In a line, for `systemctl status`.
std::string Reporter::state() const
{
    const SourceCounts counts = feed_.counts();
    const OutputState sum = sum_of(outputs_.states());
    return fmt::format("backend {}: {} connections, {} verdicts, {} lost; {} records written, {} dropped{}",
                       feed_.facts().backend_text(), counts.connections_begun, feed_.intake().verdicts_in_all(),
                       counts.lost(), sum.written, sum.dropped, unserved() ? "; metrics are not served" : "");
}

void Reporter::name_run()
{
    run_id_ = fmt::format("{:016x}", random_number());
    sequence_ = 0;
}

/// A recording's run begins with its first tick.
void Reporter::begin()
{
    started_ns_ = feed_.now_ns();
    next_summary_ns_ = started_ns_ + interval_ns();
}

std::uint64_t Reporter::interval_ns() const
{
    return static_cast<std::uint64_t>(options_.interval.count());
}

/// The kernel's events don't wait for a slow reader; a recording does.
void Reporter::flush()
{
    if (options_.replayed.empty())
        outputs_.flush();
    else
        outputs_.drain(slowest_reader);
}

std::string Reporter::name_of(const connection& c) const
{
    return process_name(c, feed_.names());
}

Origin Reporter::origin() const
{
    return {.host_name = feed_.facts().host_name, .clock = feed_.clock()};
}

void Reporter::put(Json record, const std::optional<UpstreamKey>& upstream)
{
    if (const std::string_view name = upstream ? options_.addresses.names.of(*upstream) : std::string_view();
        !name.empty())
        record["peer"]["service"] = name;
    static const Json::json_pointer pid("/process/pid");
    if (record.contains(pid))
        add_placement(record, feed_.names().placement(record[pid].get<std::uint32_t>()));
    record["finrace"]["run"] = run_id_;
    record["finrace"]["sequence"] = ++sequence_;
    disguise_.apply(record);
    outputs_.put(record);
}

Health Reporter::health(bool last) const
{
    const SourceFacts& facts = feed_.facts();
    const SourceCounts counts = feed_.counts();
    const Intake& intake = feed_.intake();
    Health health{
        .version = FINRACE_VERSION,
        .backend = facts.backend,
        .attach = facts.attach,
        .interval = options_.interval,
        .uptime = std::chrono::nanoseconds(feed_.now_ns() - started_ns_),
        .last = last,
        .connections_begun = counts.connections_begun,
        .connections_adopted = counts.connections_adopted,
        .connections_ended = intake.connections_ended(counts.losses),
        .events = intake.events(),
        .outcome_events = intake.outcome_events(),
        .losses = counts.losses,
        .outputs = outputs_.states(),
        .beside = {},
        .missing_hooks = {},
        .upstreams = intake.upstreams().size(),
        .verdicts = intake.verdicts(),
        .unclassified = intake.unclassified(),
        .confinement = confinement_,
    };
    if (recorder_ != nullptr)
        health.beside.push_back(recorder_->state());
    if (unserved()) // where it listens, the library will start yet
        health.beside.push_back({.name = "metrics" + told_address(":"),
                                 .problem = listener_->problem() != 0 ? listener_->problem() : EAGAIN});
    for (const Hook& hook : facts.missing)
        health.missing_hooks.push_back({.name = hook.name, .purpose = hook.purpose, .problem = hook.problem});
    return health;
}

std::string Reporter::metrics()
{
    std::vector<ProgramUse> programs;
    for (const ProgramRuns& program : meter_->loop.program_runs())
        programs.push_back({.name = program.name, .runs = program.runs, .time = std::chrono::nanoseconds(program.ns)});
    const std::uint64_t now_ns = feed_.now_ns();
    if (!meter_->open || now_ns >= meter_->opened_ns + ns_per_second) { // however often it is asked for
        meter_->open = open_now(now_ns);
        meter_->opened_ns = now_ns;
    }
    return meter_->metrics.text({.health = health(false),
                                 .upstreams = meter_->loop.intake().upstreams(),
                                 .now_ns = now_ns,
                                 .open = [this](const UpstreamKey& key) { return meter_->open(key); },
                                 .programs = std::move(programs),
                                 .process = use_of_this_process(meter_->started_s)});
}

} // namespace finrace

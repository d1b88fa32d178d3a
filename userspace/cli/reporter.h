// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a run tells: records for whatever is found, summaries of itself, and metrics for whoever asks.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cli/intake.h"
#include "cli/live_loop.h"
#include "cli/metrics_server.h"
#include "cli/outputs.h"
#include "cli/run_options.h"
#include "cli/service_manager.h"
#include "core/open_table.h"
#include "sink/disguise.h"
#include "sink/history.h"
#include "sink/json.h"
#include "sink/metrics.h"

namespace finrace {

class Reporter final : public Listener {
public:
    /// A replay waits so long for whoever reads its records.
    static constexpr std::chrono::milliseconds slowest_reader = std::chrono::hours(24);

    /// `outputs` and `feed` must outlive it. Throws UsageError.
    Reporter(RunOptions options, Outputs& outputs, const Feed& feed);

    /// What a daemon has besides: whom it tells how it is, and what is left to it.
    void serve(ServiceManager& manager, const std::optional<Confinement>& confinement);
    /// From now on, or as soon as `listener` listens, it answers whoever asks for metrics. Throws UsageError.
    void serve_metrics(LiveLoop& loop, MetricsListener listener);
    /// Its losses are told with the outputs'. It must outlive this.
    void tell_of(const Recorder& recorder) { recorder_ = &recorder; }
    /// On SIGHUP it calls this as well.
    void reload_by(std::function<void()> reload) { reload_ = std::move(reload); }
    /// Takes what of these can change while it runs.
    void change(const RunOptions& fresh);

    void on_event(const event& e) override;
    void on_verdict(const Judged& judged) override;
    bool on_tick() override;
    void on_end() override;
    [[nodiscard]] std::vector<pollfd> awaited_outputs() const override { return outputs_.awaited(); }
    void on_reader_left(int descriptor) override { outputs_.reader_left(descriptor); }
    /// Logs were rotated, or the configuration has changed.
    bool on_hangup() override;

private:
    /// What the metrics tell besides what the records do.
    struct Meter {
        LiveLoop& loop;
        Metrics metrics;
        double started_s;                                          ///< since the epoch
        std::function<OpenConnections(const UpstreamKey&)> open{}; ///< open_now(), as of opened_ns
        std::uint64_t opened_ns = 0;
    };

    [[nodiscard]] std::string told_address(const char* before) const;
    void answer_if_it_listens();
    /// Metrics are asked for, and nobody is answered yet.
    [[nodiscard]] bool unserved() const { return listener_ && !server_; }
    void summarise(bool last);
    void tell_upstreams(std::uint64_t now_ns, bool all);
    /// By upstream, what is open now.
    [[nodiscard]] std::function<OpenConnections(const UpstreamKey&)> open_now(std::uint64_t now_ns) const;
    [[nodiscard]] std::string state() const;
    void name_run();
    void begin();
    [[nodiscard]] std::uint64_t interval_ns() const;
    void flush();
    [[nodiscard]] Origin origin() const;
    [[nodiscard]] std::string name_of(const connection& c) const;
    void put(Json record, const std::optional<UpstreamKey>& upstream = std::nullopt);
    [[nodiscard]] Health health(bool last) const;
    [[nodiscard]] std::string metrics();

    RunOptions options_;
    Disguise disguise_;
    Outputs& outputs_;
    const Recorder* recorder_ = nullptr;
    const Feed& feed_;
    std::uint64_t started_ns_ = 0;
    std::uint64_t next_summary_ns_ = 0;
    std::string run_id_;         ///< another one for each run
    std::uint64_t sequence_ = 0; ///< of the newest record of this run
    OpenTable open_;
    StateHistories histories_;
    std::unordered_map<UpstreamKey, UpstreamCounts, UpstreamKeyHash> told_; ///< as the newest summary has them
    ServiceManager* manager_ = nullptr;                                     ///< none in a replay
    std::optional<Confinement> confinement_;
    std::function<void()> reload_;
    std::optional<Meter> meter_;
    std::optional<MetricsListener> listener_; ///< if metrics are asked for
    std::chrono::steady_clock::time_point tried_to_listen_{};
    bool library_refused_ = false; ///< and that has been said
    std::optional<MetricsServer> server_;
};

} // namespace finrace

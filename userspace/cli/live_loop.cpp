// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/live_loop.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>

#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <fmt/format.h>

#include "cli/privileges.h"
#include "sink/facts.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

/// Nothing that ended may wait longer for its verdict than this, even without a wake-up.
constexpr std::chrono::nanoseconds longest_tick = std::chrono::milliseconds(200);
constexpr auto clock_measured_every = std::chrono::seconds(1);
/// At the end: for what waits in the ring, should a flood go on.
constexpr auto longest_farewell = std::chrono::seconds(2);

Descriptor opened(int fd, const char* call)
{
    if (fd < 0)
        throw SetupError(fmt::format("{} failed: {}", call, std::strerror(errno)));
    return Descriptor(fd);
}

timespec to_timespec(std::chrono::nanoseconds duration)
{
    return {.tv_sec = duration.count() / 1'000'000'000, .tv_nsec = duration.count() % 1'000'000'000};
}

void watch(const Descriptor& epoll, int fd, std::uint32_t events, const char* what)
{
    epoll_event wanted{};
    wanted.events = events;
    wanted.data.fd = fd;
    if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &wanted) != 0)
        throw SetupError(fmt::format("waiting for {} failed: {}", what, std::strerror(errno)));
}

} // namespace

LiveLoop::LiveLoop(const WatchOptions& options, std::chrono::nanoseconds tick)
    : filter_(options.filter), tick_(std::min(tick, longest_tick)), clock_measured_(std::chrono::steady_clock::now())
{
    check_combination(options);
    require_capabilities();

    ::signal(SIGPIPE, SIG_IGN); // a reader that leaves is told by EPIPE
    sigset_t stop{};
    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGHUP);
    sigaddset(&stop, SIGUSR1);
    struct sigaction hangup {};
    hangup_ignored_ = ::sigaction(SIGHUP, nullptr, &hangup) == 0 && hangup.sa_handler == SIG_IGN;
    ::sigprocmask(SIG_BLOCK, &stop, nullptr);
    signals_ = opened(::signalfd(-1, &stop, SFD_CLOEXEC | SFD_NONBLOCK), "signalfd()");

    source_ = std::make_unique<LiveSource>(options.live);
    if (options.filter.side == Side::server && source_->backend() == "cgroup")
        throw UsageError("--side server: backend cgroup, the one that works here, doesn't tell what servers do; "
                         "`finrace doctor` says what keeps backend trace from it");
    docket_.emplace(source_->tells_outcomes(), [this](const Judged& judged) { on_judged(judged); });
    say_warnings();
    for (const Hook& hook : source_->hooks())
        if (!hook.attached)
            say(fmt::format("{} is not attached ({}); not seen: {}", hook.name, hook.problem, hook.purpose));
    const std::string by = source_->attach().empty() ? "" : " by " + source_->attach();
    say(fmt::format("ready (backend {}{}, {} connections taken in)", source_->backend(), by,
                    source_->connections_adopted()));
}

void LiveLoop::say_warnings()
{
    const std::vector<std::string>& warnings = source_->warnings();
    for (; warnings_said_ < warnings.size(); ++warnings_said_)
        say("warning: " + warnings[warnings_said_]);
}

std::uint64_t LiveLoop::connections_ended(const loss_counters& losses) const
{
    return ended_ + losses.by_kind[EVENT_CLOSED] + losses.by_kind[EVENT_OPEN_FAILED];
}

void LiveLoop::on_judged(const Judged& judged)
{
    if (judged.classification.ending == Ending::unclassified)
        ++unclassified_;
    if (!judged.classification.verdict || !filter_.matches(judged.e))
        return;
    ++verdicts_[judged.classification.verdict->cause];
    listener_->on_verdict(judged);
}

/// Returns true if there is more.
bool LiveLoop::take_in()
{
    if (const auto now = std::chrono::steady_clock::now(); now - clock_measured_ >= clock_measured_every) {
        clock_.measure();
        clock_measured_ = now;
    }
    const bool more = source_->consume([&](const event& e) {
        ++events_;
        const bool followed = e.connection.id != 0;
        if (followed && (e.kind == EVENT_CLOSED || e.kind == EVENT_OPEN_FAILED))
            ++ended_;
        // What tells of outcomes is about others as well: a client's connection, another upstream's. And the server
        // at the other end is another process.
        const bool tells_outcome = e.kind >= EVENT_RELEASED;
        outcome_events_ += tells_outcome ? 1 : 0;
        const bool wanted = !tells_outcome && filter_.matches(e);
        if (wanted && followed)
            listener_->on_event(e);
        if (wanted || tells_outcome || !is_client(e))
            docket_->take(e);
    });
    docket_->advance(WallClock::monotonic_now_ns());
    say_warnings();
    return more;
}

bool LiveLoop::goes_on_after_signal()
{
    signalfd_siginfo signal{};
    if (::read(signals_.get(), &signal, sizeof(signal)) != sizeof(signal))
        return true;
    if (signal.ssi_signo == SIGUSR1) { // what nginx opens its logs anew on: nobody means the end by it
        listener_->on_hangup();
        return true;
    }
    return signal.ssi_signo == SIGHUP && (listener_->on_hangup() || hangup_ignored_);
}

void LiveLoop::run(LiveListener& listener)
{
    listener_ = &listener;
    const Descriptor epoll = opened(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1()");
    const Descriptor timer = opened(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd_create()");
    const itimerspec period{.it_interval = to_timespec(tick_), .it_value = to_timespec(tick_)};
    ::timerfd_settime(timer.get(), 0, &period, nullptr);

    // Edges, not levels: a wake-up means something urgent, but any event in the ring keeps it readable. The timer
    // collects those in one go.
    watch(epoll, source_->wakeup_fd(), EPOLLIN | EPOLLET, "the kernel's events");
    watch(epoll, signals_.get(), EPOLLIN, "signals");
    watch(epoll, timer.get(), EPOLLIN, "the timer");
    const int output = listener.output_descriptor();
    const auto watch_output = [&] {
        if (output < 0)
            return;
        epoll_event wanted{};
        wanted.events = EPOLLOUT | EPOLLET;
        wanted.data.fd = output;
        // Regular files refuse (EPERM): they have neither a reader nor room to wait for.
        ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, output, &wanted);
    };
    watch_output();

    bool more = false;
    for (bool running = true; running;) {
        std::array<epoll_event, 4> ready{};
        const int count = ::epoll_wait(epoll.get(), ready.data(), static_cast<int>(ready.size()), more ? 0 : -1);
        if (count < 0 && errno != EINTR)
            throw SetupError(fmt::format("epoll_wait() failed: {}", std::strerror(errno)));
        for (int i = 0; i < count; ++i) {
            const int fd = ready[static_cast<std::size_t>(i)].data.fd;
            if (fd == signals_.get()) {
                running = goes_on_after_signal();
                watch_output(); // what was opened anew is not watched any more
            } else if (fd == timer.get()) {
                std::uint64_t expirations = 0;
                [[maybe_unused]] const ssize_t got = ::read(timer.get(), &expirations, sizeof(expirations));
            } else if (fd == output && (ready[static_cast<std::size_t>(i)].events & (EPOLLERR | EPOLLHUP)) != 0) {
                listener.on_reader_left();
            }
        }
        more = take_in();
        if (!listener.on_tick())
            running = false;
    }
    for (const auto end = std::chrono::steady_clock::now() + longest_farewell;
         more && std::chrono::steady_clock::now() < end;)
        more = take_in();
    docket_->finish();
}

} // namespace finrace

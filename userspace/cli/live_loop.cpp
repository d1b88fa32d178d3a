// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/live_loop.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>
#include <vector>

#include <poll.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <fmt/format.h>

#include "cli/privileges.h"
#include "sink/stream.h"
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
    if (fd < 0) {
        const int error = errno;
        throw SetupError(fmt::format("{} failed: {}", call, std::strerror(error)), error);
    }
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

LiveLoop::LiveLoop(const WatchOptions& options, std::chrono::nanoseconds tick, Recorder* recorder)
    : timer_(opened(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd_create()")),
      recorder_(recorder), clock_measured_(std::chrono::steady_clock::now())
{
    check_combination(options);
    require_privileges();
    tick_every(tick);

    let_writes_fail();
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
    facts_ = source_->facts();
    check_told(options.filter, facts_);
    intake_.emplace(options.filter, names(), facts_.tells_outcomes);
    intake_->know(options.idle_timers);
    if (recorder_ != nullptr)
        recorder_->begin(facts_, options.filter.flags, options.live.report_states, clock_);
    say_warnings();
    for (const Hook& hook : facts_.missing)
        say(fmt::format("{} is not attached ({}); not seen: {}", hook.name, hook.problem, hook.purpose));
    say(fmt::format("ready (backend {}, {} connections taken in)", facts_.backend_text(),
                    counts().connections_adopted));
}

/// What is judged now and what is judged from the recording must know the same.
const ProcessNames& LiveLoop::names() const
{
    if (recorder_ != nullptr)
        return recorder_->names();
    return live_names_;
}

void LiveLoop::use_rights()
{
    if (const int problem = live_names_.keep_pods_open(); problem != 0 && problem != ENOENT)
        say(fmt::format("warning: names of pods are not told: {}: {}", PodNames::usual_folder, std::strerror(problem)));
}

void LiveLoop::say_warnings()
{
    const std::vector<std::string>& warnings = source_->warnings();
    for (; warnings_said_ < warnings.size(); ++warnings_said_)
        say("warning: " + warnings[warnings_said_]);
}

void LiveLoop::measure_clock()
{
    const auto now = std::chrono::steady_clock::now();
    if (now - clock_measured_ < clock_measured_every)
        return;
    clock_.measure();
    clock_measured_ = now;
    if (recorder_ != nullptr)
        recorder_->add(clock_, source_->counts());
}

/// Returns true if there is more.
bool LiveLoop::take_in()
{
    measure_clock();
    const bool more = source_->consume([&](const event& e) {
        if (recorder_ != nullptr)
            recorder_->note_process(e.connection.pid, live_names_);
        if (!intake_->admits(e))
            return;
        if (recorder_ != nullptr) {
            recorder_->note_placement(e.connection.pid, live_names_);
            recorder_->add(e);
        }
        intake_->take(e);
    });
    const std::uint64_t now_ns = WallClock::monotonic_now_ns();
    if (recorder_ != nullptr)
        recorder_->add(RecordedTick{now_ns});
    intake_->advance(now_ns);
    say_warnings();
    return more;
}

bool LiveLoop::goes_on_after_signal(Listener& listener)
{
    signalfd_siginfo signal{};
    if (::read(signals_.get(), &signal, sizeof(signal)) != sizeof(signal))
        return true;
    if (signal.ssi_signo == SIGUSR1) { // what nginx opens its logs anew on: nobody means the end by it
        listener.on_hangup();
        return true;
    }
    return signal.ssi_signo == SIGHUP && (listener.on_hangup() || hangup_ignored_);
}

void LiveLoop::tick_every(std::chrono::nanoseconds tick)
{
    const timespec period = to_timespec(std::min(tick, longest_tick));
    const itimerspec armed{.it_interval = period, .it_value = period};
    ::timerfd_settime(timer_.get(), 0, &armed, nullptr);
}

void LiveLoop::watch_input(int descriptor, std::function<void()> on_ready)
{
    input_ = descriptor;
    on_input_ = std::move(on_ready);
}

void LiveLoop::run(Listener& listener)
{
    const std::uint64_t began_ns = now_ns();
    intake_->listen(listener);
    const Descriptor epoll = opened(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1()");

    // Edges, not levels: a wake-up means something urgent, but any event in the ring keeps it readable. The timer
    // collects those in one go.
    watch(epoll, source_->wakeup_fd(), EPOLLIN | EPOLLET, "the kernel's events");
    watch(epoll, signals_.get(), EPOLLIN, "signals");
    watch(epoll, timer_.get(), EPOLLIN, "the timer");
    const auto watch_outputs = [&] {
        static_assert(POLLIN == EPOLLIN && POLLOUT == EPOLLOUT);
        std::vector<pollfd> outputs = listener.awaited_outputs();
        if (recorder_ != nullptr)
            outputs.push_back(recorder_->awaited());
        for (const pollfd& output : outputs) {
            epoll_event wanted{};
            wanted.events = static_cast<std::uint32_t>(output.events) | EPOLLET;
            wanted.data.fd = output.fd;
            // Regular files refuse (EPERM): they have neither a reader nor room to wait for.
            ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, output.fd, &wanted);
        }
    };
    watch_outputs();
    int watched_input = -1;

    bool more = false;
    for (bool running = true; running;) {
        if (input_ != watched_input)
            watch(epoll, watched_input = input_, EPOLLIN, "input");
        std::array<epoll_event, 16> ready{};
        const int count = ::epoll_wait(epoll.get(), ready.data(), static_cast<int>(ready.size()), more ? 0 : -1);
        if (count < 0 && errno != EINTR)
            throw SetupError(fmt::format("epoll_wait() failed: {}", std::strerror(errno)));
        bool looks = more; // what an output has taken is no reason to look for events, which would make more to take
        for (int i = 0; i < count; ++i) {
            const int fd = ready[static_cast<std::size_t>(i)].data.fd;
            if (fd == source_->wakeup_fd()) {
                looks = true;
            } else if (fd == signals_.get()) {
                looks = true;
                running = goes_on_after_signal(listener);
            } else if (fd == timer_.get()) {
                looks = true;
                std::uint64_t expirations = 0;
                [[maybe_unused]] const ssize_t got = ::read(timer_.get(), &expirations, sizeof(expirations));
                watch_outputs(); // what was opened or connected anew is not watched any more
            } else if (fd == input_) {
                looks = true;
                on_input_();
            } else if ((ready[static_cast<std::size_t>(i)].events & (EPOLLERR | EPOLLHUP)) != 0) {
                if (recorder_ != nullptr && fd == recorder_->awaited().fd)
                    recorder_->reader_left();
                else
                    listener.on_reader_left(fd);
            }
        }
        if (looks)
            more = take_in();
        else if (recorder_ != nullptr)
            recorder_->flush();
        const bool is_over = duration_ && now_ns() - began_ns >= static_cast<std::uint64_t>(duration_->count());
        if (!listener.on_tick() || is_over)
            running = false;
    }
    for (const auto end = std::chrono::steady_clock::now() + longest_farewell;
         more && std::chrono::steady_clock::now() < end;)
        more = take_in();
    if (recorder_ != nullptr)
        recorder_->end(source_->counts());
    intake_->finish();
    listener.on_end();
}

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/live_terminal.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "source/live.h"

namespace finrace {

namespace {

constexpr std::string_view erase_below = "\r\x1b[J";
constexpr std::string_view hide_cursor = "\x1b[?25l";
constexpr std::string_view show_cursor = "\x1b[?25h";

/// SIGTTIN and SIGTTOU among them: blocked, they stop nobody, and what would have raised them fails instead.
sigset_t signals_of_terminals()
{
    sigset_t set{};
    sigemptyset(&set);
    for (const int signal : {SIGTSTP, SIGCONT, SIGWINCH, SIGQUIT, SIGTTIN, SIGTTOU})
        sigaddset(&set, signal);
    return set;
}

} // namespace

bool LiveTerminal::is_there()
{
    const char* term = std::getenv("TERM");
    return ::isatty(STDIN_FILENO) == 1 && ::isatty(STDOUT_FILENO) == 1 && term != nullptr && *term != '\0' &&
           std::string_view(term) != "dumb";
}

LiveTerminal::LiveTerminal(Stream& stream) : stream_(stream)
{
    const sigset_t set = signals_of_terminals();
    ::sigprocmask(SIG_BLOCK, &set, nullptr);
    signals_ = Descriptor(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    epoll_ = Descriptor(::epoll_create1(EPOLL_CLOEXEC));
    epoll_event wanted{};
    wanted.events = EPOLLIN;
    wanted.data.fd = signals_.get();
    if (!signals_ || !epoll_ || ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, signals_.get(), &wanted) != 0)
        throw SetupError(fmt::format("waiting for the terminal failed: {}", std::strerror(errno)));
}

LiveTerminal::~LiveTerminal()
{
    look_who_is_in_front(); // who is not must leave the terminal as others have it
    leave();
}

void LiveTerminal::look_who_is_in_front()
{
    const bool in_front = ::tcgetpgrp(STDIN_FILENO) == ::getpgrp();
    if (in_front && !in_front_)
        enter();
    if (!in_front && in_front_) {
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, STDIN_FILENO, nullptr);
        in_front_ = below_ = false;
    }
}

void LiveTerminal::enter()
{
    termios mode{};
    if (::tcgetattr(STDIN_FILENO, &mode) != 0)
        return;
    const bool is_ours = knows_before_ && (mode.c_lflag & ICANON) == 0; // continued after a SIGSTOP without a shell
    if (!is_ours)
        before_ = mode;
    knows_before_ = true;
    mode.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
    mode.c_cc[VMIN] = 0; // a read never waits
    mode.c_cc[VTIME] = 0;
    epoll_event wanted{};
    wanted.events = EPOLLIN;
    wanted.data.fd = STDIN_FILENO;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, STDIN_FILENO, &wanted) != 0 ||
        ::tcsetattr(STDIN_FILENO, TCSANOW, &mode) != 0) {
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, STDIN_FILENO, nullptr);
        return;
    }
    in_front_ = true;
    below_ = false;
    drawn_.clear();
    stream_.write_text(hide_cursor);
}

void LiveTerminal::leave()
{
    if (!in_front_)
        return;
    stream_.write_text(erase_below);
    stream_.write_text(show_cursor);
    stream_.drain(Stream::last_words);
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, STDIN_FILENO, nullptr);
    ::tcsetattr(STDIN_FILENO, TCSANOW, &before_);
    in_front_ = below_ = false;
}

void LiveTerminal::stop()
{
    leave();
    sigset_t stop_signal{};
    sigemptyset(&stop_signal);
    sigaddset(&stop_signal, SIGTSTP);
    ::raise(SIGTSTP);
    ::pthread_sigmask(SIG_UNBLOCK, &stop_signal, nullptr); // here it stands until it is continued
    ::pthread_sigmask(SIG_BLOCK, &stop_signal, nullptr);
    look_who_is_in_front();
}

LiveTerminal::Input LiveTerminal::take_input()
{
    Input input;
    signalfd_siginfo signal{};
    while (::read(signals_.get(), &signal, sizeof(signal)) == sizeof(signal)) {
        if (signal.ssi_signo == SIGQUIT)
            input.ends = true;
        else if (signal.ssi_signo == SIGTSTP)
            stop();
        else if (signal.ssi_signo == SIGCONT && in_front_) {
            // Stopped by SIGSTOP, it could not restore anything, and the shell has done so since.
            ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, STDIN_FILENO, nullptr);
            in_front_ = false;
            look_who_is_in_front();
        }
        drawn_.clear();
    }
    if (!in_front_)
        return input;
    std::array<char, 256> bytes{};
    const ssize_t got = ::read(STDIN_FILENO, bytes.data(), bytes.size());
    if (got > 0) {
        input.typed.assign(bytes.data(), static_cast<std::size_t>(got));
    } else if (got < 0 && errno != EAGAIN && errno != EINTR) {
        look_who_is_in_front();
        input.ends = in_front_; // the terminal has gone
    }
    return input;
}

void LiveTerminal::write_above(std::string_view text)
{
    if (text.empty())
        return;
    if (below_ && stream_.takes(text.size() + erase_below.size())) {
        stream_.write_text(erase_below);
        below_ = false;
        drawn_.clear();
    }
    stream_.write_text(text); // counted as dropped where there is no room
}

void LiveTerminal::draw_below(const std::vector<std::string>& lines)
{
    if (!in_front_ || lines.empty() || stream_.waiting() > 0)
        return;
    // A last column that is written to may leave the cursor there or below, as terminals have it: \r settles that.
    std::string text = fmt::format("{}{}\r", erase_below, fmt::join(lines, "\r\n"));
    if (lines.size() > 1)
        text += fmt::format("\x1b[{}A", lines.size() - 1);
    if (text == drawn_)
        return;
    stream_.write_text(text);
    drawn_ = std::move(text);
    below_ = true;
}

TerminalSize LiveTerminal::size()
{
    const auto size = terminal_size();
    return size && size->rows > 0 ? *size : TerminalSize{.columns = 80, .rows = 24};
}

} // namespace finrace

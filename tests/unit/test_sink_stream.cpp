// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The writer against real pipes, files and a full device.
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "folder.h"
#include "sink/background_writer.h"
#include "sink/stream.h"

using namespace finrace;
using namespace finrace::test;

namespace {

struct Pipe {
    std::array<int, 2> ends{-1, -1};

    Pipe() { REQUIRE(::pipe(ends.data()) == 0); }
    ~Pipe()
    {
        close_reader();
        ::close(ends[1]);
    }
    Pipe(const Pipe&) = delete;
    Pipe& operator=(const Pipe&) = delete;
    void close_reader()
    {
        if (ends[0] >= 0)
            ::close(ends[0]);
        ends[0] = -1;
    }
    /// Whatever is in it now.
    std::string read() const
    {
        std::string text(1U << 20U, '\0');
        ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
        const ssize_t count = ::read(ends[0], text.data(), text.size());
        text.resize(count > 0 ? static_cast<std::size_t>(count) : 0);
        return text;
    }
};

std::string content(const std::string& path)
{
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

constexpr std::chrono::seconds patience(30);

} // namespace

TEST_CASE("behind: a write that hangs keeps nobody waiting, and tells of its end")
{
    ::signal(SIGPIPE, SIG_IGN);
    const Pipe pipe; // which blocks once it is full, as a disk may
    BackgroundWriter writer;
    CHECK_FALSE(writer.busy());
    const std::string text(1U << 20U, 'x');
    writer.begin(pipe.ends[1], text);
    CHECK(writer.busy());
    CHECK_FALSE(writer.result());
    const auto is_over = [&](int milliseconds) {
        pollfd ended{.fd = writer.descriptor(), .events = POLLIN, .revents = 0};
        return ::poll(&ended, 1, milliseconds) == 1;
    };
    CHECK_FALSE(is_over(20));
    std::size_t got = 0;
    while (!is_over(1))
        got += pipe.read().size();
    const auto result = writer.result();
    REQUIRE(result);
    CHECK(result->count == static_cast<std::int64_t>(text.size()));
    CHECK_FALSE(writer.busy());
    CHECK_FALSE(is_over(0));
    got += pipe.read().size();
    CHECK(got == text.size());

    writer.begin(-1, "x");
    CHECK(is_over(30'000));
    CHECK(writer.result()->error == EBADF);

    writer.begin(pipe.ends[1], text); // nobody reads it before the end: it is left to itself
}

TEST_CASE("behind: what is written comes out whole and in its order, what finds no room is counted")
{
    const Folder directory;
    const std::string path = directory.at("records");
    Stream stream = Stream::to_file(path, 1U << 20U);
    stream.write_behind();
    std::string due;
    for (int i = 0; i < 40'000; ++i) {
        const std::string line = std::to_string(i) + std::string(100, '.');
        if (stream.takes(line.size()))
            due += line + '\n';
        stream.write(line);
        if (i % 20'000 == 0)
            stream.flush();
    }
    CHECK(stream.awaits());
    stream.flush_for(patience);
    CHECK_FALSE(stream.awaits());
    CHECK(stream.waiting() == 0);
    CHECK(content(path) == due);
    CHECK(stream.written() == static_cast<std::uint64_t>(std::count(due.begin(), due.end(), '\n')));
    CHECK(stream.dropped() > 0);
    CHECK(stream.written() + stream.dropped() == 40'000);
}

TEST_CASE("a slow reader: lines wait, are dropped beyond the limit, and never torn")
{
    const Pipe pipe;
    constexpr std::size_t limit = 100'000;
    Stream stream = Stream::to_descriptor(pipe.ends[1], limit);
    const std::string line(999, 'x');
    for (int i = 0; i < 500; ++i) {
        stream.write(line);
        stream.flush(); // must not block: nobody reads
    }
    CHECK(stream.waiting() <= limit);
    CHECK(stream.dropped() > 0);

    std::string got;
    for (std::string part = pipe.read(); !part.empty(); part = pipe.read()) {
        got += part;
        stream.flush();
    }
    CHECK(stream.waiting() == 0);
    CHECK(stream.written() + stream.dropped() == 500);
    CHECK(got.size() == stream.written() * 1000);
    for (std::size_t at = 999; at < got.size(); at += 1000)
        REQUIRE(got[at] == '\n');
    CHECK_FALSE(stream.closed_by_reader());
}

TEST_CASE("a line is not torn even when the writer gives up")
{
    const Pipe pipe;
    {
        Stream stream = Stream::to_descriptor(pipe.ends[1]);
        for (int i = 0; i < 500; ++i)
            stream.write(std::string(700, 'x'));
        stream.drain(std::chrono::milliseconds(10));
        CHECK(stream.written() + stream.dropped() == 500);
        CHECK(stream.dropped() > 0);
    }
    const std::string got = pipe.read();
    REQUIRE_FALSE(got.empty());
    CHECK(got.back() == '\n');
}

TEST_CASE("the descriptor's own blocking mode stays as it was")
{
    const Pipe pipe;
    const Stream stream = Stream::to_descriptor(pipe.ends[1]);
    CHECK((::fcntl(pipe.ends[1], F_GETFL) & O_NONBLOCK) == 0);
}

TEST_CASE("a reader that leaves is noticed, and the program lives on")
{
    ::signal(SIGPIPE, SIG_IGN); // as the program does
    Pipe pipe;
    Stream stream = Stream::to_descriptor(pipe.ends[1]);
    pipe.close_reader();
    stream.write("a");
    stream.flush();
    CHECK(stream.closed_by_reader());
    stream.write("b");
    CHECK(stream.dropped() == 1);
}

TEST_CASE("a socket as output")
{
    std::array<int, 2> ends{};
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) == 0);
    {
        Stream stream = Stream::to_descriptor(ends[1]);
        stream.write("line");
        stream.flush();
        std::array<char, 16> got{};
        CHECK(::recv(ends[0], got.data(), got.size(), MSG_DONTWAIT) == 5);
        ::close(ends[0]);
        stream.write("line");
        stream.flush();
        CHECK(stream.closed_by_reader());
    }
    ::close(ends[1]);
}

TEST_CASE("a full disk: the problem is told, the lines wait and are counted if they can't be written")
{
    Stream stream = Stream::to_file("/dev/full");
    stream.write("line");
    stream.flush();
    CHECK(stream.problem() == ENOSPC);
    CHECK(stream.waiting() == 5);
    CHECK(stream.written() == 0);
    stream.drain(std::chrono::milliseconds(10));
    CHECK(stream.dropped() == 1);
}

TEST_CASE("opened anew: lines go on in the new file, whole ones alone")
{
    const Folder directory;
    const std::string path = directory.at("records");
    Stream stream = Stream::to_file(path);
    if (GENERATE(false, true))
        stream.write_behind();
    const int descriptor = stream.descriptor();
    stream.write("before");
    stream.flush_for(patience);
    std::filesystem::rename(path, path + ".1");
    SECTION("rotated")
    {
        stream.reopen(path);
        CHECK(stream.descriptor() == descriptor);
        stream.write("after");
        stream.flush_for(patience);
        CHECK(content(path + ".1") == "before\n");
        CHECK(content(path) == "after\n");
        CHECK(stream.dropped() == 0);
    }
    SECTION("something in the way")
    {
        std::filesystem::create_directory(path);
        CHECK_THROWS_AS(stream.reopen(path), OutputError);
        stream.write("after");
        stream.flush_for(patience);
        CHECK(content(path + ".1") == "before\nafter\n");
    }
    SECTION("a full disk had taken a part of a line")
    {
        ::signal(SIGXFSZ, SIG_IGN);
        rlimit limit{};
        REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
        const rlimit small{.rlim_cur = 10, .rlim_max = limit.rlim_max};
        REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
        stream.write("torn in two");
        stream.write("whole");
        stream.flush_for(patience);
        const int problem = stream.problem();
        stream.reopen(path);
        stream.flush_for(patience);
        REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
        ::signal(SIGXFSZ, SIG_DFL);
        CHECK(problem == EFBIG);
        CHECK(content(path + ".1") == "before\ntor");
        CHECK(content(path) == "whole\n");
        CHECK(stream.dropped() == 1);
    }
}

TEST_CASE("a full disk had room for all of a line but its end: that is no loss")
{
    const Folder directory;
    const std::string path = directory.at("records");
    Stream stream = Stream::to_file(path);
    if (GENERATE(false, true))
        stream.write_behind();
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
    const auto allow = [&](rlim_t bytes) {
        const rlimit changed{.rlim_cur = bytes, .rlim_max = limit.rlim_max};
        REQUIRE(::setrlimit(RLIMIT_FSIZE, &changed) == 0);
    };
    stream.write("first");
    stream.write("second");
    allow(5);
    stream.flush_for(patience);
    const int problem = stream.problem();
    allow(limit.rlim_cur);
    ::signal(SIGXFSZ, SIG_DFL);
    CHECK(problem == EFBIG);
    CHECK(content(path) == "first");
    SECTION("at the end of the process, and the next one ends it")
    {
        Stream next = Stream::to_file(path);
        stream.drop_waiting();
        CHECK(content(path) == "first\n");
        CHECK(stream.written() == 1);
        CHECK(stream.dropped() == 1);
    }
    SECTION("rotated")
    {
        std::filesystem::rename(path, path + ".1");
        allow(5);
        ::signal(SIGXFSZ, SIG_IGN);
        stream.reopen(path);
        stream.flush_for(patience);
        allow(limit.rlim_cur);
        ::signal(SIGXFSZ, SIG_DFL);
        stream.flush_for(patience);
        CHECK(content(path) == "second\n");
        CHECK(stream.written() == 2);
        CHECK(stream.dropped() == 0);
    }
}

TEST_CASE("a file is created for its owner, appended to, and its torn last line is ended")
{
    const Folder directory;
    const std::string path = directory.at("records");
    {
        Stream stream = Stream::to_file(path);
        stream.write("one");
        stream.flush();
    }
    struct stat status {};
    REQUIRE(::stat(path.c_str(), &status) == 0);
    CHECK((status.st_mode & 0777U) == 0600U);
    std::ofstream(path, std::ios::app) << "torn";
    {
        Stream stream = Stream::to_file(path);
        stream.write("two");
        stream.flush();
        CHECK(stream.written() == 1);
    }
    CHECK(content(path) == "one\ntorn\ntwo\n");
}

TEST_CASE("in a folder that others may write to, what may lead elsewhere is refused, and untouched")
{
    const Folder directory;
    const std::string shared = directory.at("shared");
    const std::string target = directory.holding("target", "as it was");
    std::filesystem::create_directory(shared);
    REQUIRE(::chmod(shared.c_str(), 01777) == 0);
    const std::string path = shared + "/records";
    const auto refused = [&](const std::string& name, const std::string& why) {
        CHECK_THROWS_WITH(Stream::to_file(name), Catch::StartsWith(path + " is " + why));
        CHECK(content(target) == "as it was");
    };
    SECTION("a link")
    {
        std::filesystem::create_symlink(target, path);
        refused(path, "a symbolic link");
        std::filesystem::remove(path);
        std::filesystem::create_symlink(directory.at("not there"), path);
        refused(path, "a symbolic link");
        CHECK(!std::filesystem::exists(directory.at("not there")));
    }
    SECTION("a link to a folder")
    {
        std::filesystem::create_directory_symlink(directory.path, path);
        refused(path + "/target", "a symbolic link");
        refused(path + "//target", "a symbolic link");
        refused(path + "/../shared/records/target", "a symbolic link");
    }
    SECTION("a link behind links of one's own")
    {
        std::filesystem::create_symlink(target, path);
        std::filesystem::create_directory_symlink("shared", directory.at("logs"));
        std::filesystem::create_symlink(directory.at("logs/records"), directory.at("link"));
        refused(directory.at("logs/records"), "a symbolic link");
        refused(directory.at("link"), "a symbolic link");
    }
    SECTION("a file that has another name")
    {
        std::filesystem::create_hard_link(target, path);
        refused(path, "a file that has another name");
    }
    SECTION("what is one's own is not; and nowhere else is a link")
    {
        std::ofstream(path) << "one\n";
        std::filesystem::create_symlink(path, directory.at("link"));
        Stream stream = Stream::to_file(directory.at("link"));
        stream.write("two");
        stream.flush();
        CHECK(content(path) == "one\ntwo\n");
    }
}

TEST_CASE("links of one's own are followed, as far as the kernel follows any")
{
    const Folder directory;
    const std::string path = directory.at("records");
    const auto write = [](const std::string& name) {
        Stream stream = Stream::to_file(name);
        stream.write("one");
        stream.flush();
    };
    SECTION("to what is not there yet, by folders, and up again")
    {
        std::filesystem::create_directory(directory.at("folder"));
        std::filesystem::create_directory_symlink("folder/", directory.at("logs"));
        std::filesystem::create_symlink("../records", directory.at("folder/link"));
        write(directory.at("logs//link"));
        CHECK(content(path) == "one\n");
    }
    SECTION("what an open file is called in proc")
    {
        const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        REQUIRE(fd >= 0);
        write("/proc/self/fd/" + std::to_string(fd));
        ::close(fd);
        CHECK(content(path) == "one\n");
    }
    SECTION("in a circle")
    {
        std::filesystem::create_symlink("records", path);
        CHECK_THROWS_WITH(Stream::to_file(path), Catch::Contains("Too many levels of symbolic links"));
    }
}

TEST_CASE("a pipe that is opened anew is the same one: who reads it has seen the beginning of a line")
{
    const Folder directory;
    const std::string fifo = directory.at("fifo");
    REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
    Pipe pipe; // its reading end is that of the other one
    ::close(pipe.ends[0]);
    pipe.ends[0] = ::open(fifo.c_str(), O_RDONLY | O_NONBLOCK);
    REQUIRE(pipe.ends[0] >= 0);
    Stream stream = Stream::to_file(fifo);
    REQUIRE(::fcntl(pipe.ends[0], F_SETPIPE_SZ, 4096) >= 0);
    const std::string longer(50'000, 'x');
    stream.write(longer);
    stream.flush();
    std::string got = pipe.read();
    stream.flush();
    CHECK(stream.waiting() > 0);
    stream.reopen(fifo);
    stream.write("after");
    for (int i = 0; i < 100 && stream.waiting() > 0; ++i) {
        got += pipe.read();
        stream.flush();
    }
    got += pipe.read();
    CHECK(got == longer + "\nafter\n");
    CHECK(stream.written() == 2);
    CHECK(stream.dropped() == 0);
}

TEST_CASE("outputs that cannot be opened say why")
{
    const Folder directory;
    CHECK_THROWS_WITH(Stream::to_file(directory.path), Catch::Contains("Is a directory"));
    CHECK_THROWS_WITH(Stream::to_file(directory.at("no/such")), Catch::Contains("No such file"));
    CHECK_THROWS_WITH(Stream::to_file(directory.path + "/"), Catch::Contains("Is a directory"));
    CHECK_THROWS_WITH(Stream::to_file(""), Catch::Contains("cannot open"));
    const std::string fifo = directory.at("fifo");
    REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
    CHECK_THROWS_WITH(Stream::to_file(fifo), Catch::Contains("nobody reads"));
    CHECK_THROWS_AS(Stream::to_descriptor(9999), OutputError);
}

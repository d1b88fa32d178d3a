// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include <catch2/catch.hpp>

#include "source/host.h"

using namespace finrace;

TEST_CASE("overflows of accept queues are read by their name", "[host]")
{
    const std::string text = "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 1588 1600\n"
                             "IpExt: InNoRoutes ListenOverflows\nIpExt: 0 7\n";
    CHECK(parse_listen_overflows(text) == 1588U);
    CHECK(parse_listen_overflows("IpExt: ListenOverflows\nIpExt: 7\n" + text) == 1588U);
    CHECK(!parse_listen_overflows("TcpExt: SyncookiesSent ListenOverflows\nTcpExt: 1\n"));
    CHECK(!parse_listen_overflows("TcpExt: ListenDrops\nTcpExt: 1\n"));
    CHECK(!parse_listen_overflows("TcpExt: ListenOverflows\nTcpExt: x\n"));
    CHECK(!parse_listen_overflows(""));
    CHECK(!parse_listen_overflows("\n\n\n"));
    CHECK(listen_overflows());
}
